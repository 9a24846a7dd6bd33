"""Names in, leases out: what a request and an operator may rely on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import edit_config, edit_tensors, write_gralora, write_lora

from adapters.harness import (
    UNIT_BYTES,
    WAIT_S,
    Gate,
    is_pending,
    lease,
    managing,
    quiesce,
    use,
    weights,
    write_units,
)
from gralora_runtime.adapters.checkpoint import WEIGHTS_FILE
from gralora_runtime.adapters.lease import BASE_LEASE
from gralora_runtime.adapters.loader import load
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.store import AdapterState
from gralora_runtime.errors import (
    AdapterBusyError,
    AdapterCapacityError,
    AdapterExistsError,
    AdapterNotFoundError,
    AdapterRejectedError,
    ConfigError,
    DrainingError,
    InvalidRequestError,
)

Make = Callable[..., AdapterManager]
