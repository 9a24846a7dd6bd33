"""Settings of every test. Tiny models gain nothing from threads, and spinning ones would slow whatever runs beside."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
