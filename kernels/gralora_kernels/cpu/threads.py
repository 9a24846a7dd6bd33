"""Chooses the threads that Numba's parallel regions run on. Knows no kernel."""

from __future__ import annotations

import importlib
import logging
import threading
from contextlib import AbstractContextManager, nullcontext

import numba
import torch  # noqa: F401  # first: with the omp layer Numba then runs on torch's own threads

logger = logging.getLogger(__name__)


def choose_layer() -> str:
    """ "omp" where it loads, so that torch and Numba share threads; else "workqueue", which needs no library.

    Called before the first parallel region, after which Numba no longer listens.
    """
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError as error:
        logger.warning("Numba's OpenMP layer does not load (%s): using its workqueue beside torch's threads", error)
        return "workqueue"
    return "omp"


numba.config.THREADING_LAYER = LAYER = choose_layer()
logger.info("Numba threading layer: %s", LAYER)

# Entered around every parallel region: two threads inside the workqueue at once abort the process.
region_lock: AbstractContextManager[object] = threading.RLock() if LAYER == "workqueue" else nullcontext()


def configure(num_threads: int) -> None:
    """Use so many threads for regions entered from the calling thread: Numba keeps the number per thread.

    Raises ValueError for more than the machine gives this process.
    """
    if not 1 <= num_threads <= numba.config.NUMBA_NUM_THREADS:
        raise ValueError(f"num_threads must be in 1..{numba.config.NUMBA_NUM_THREADS}, got {num_threads}")
    numba.set_num_threads(num_threads)
