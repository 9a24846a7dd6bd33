from benchmarks.faults.fault import Fault
FAULTS: tuple[Fault, ...] = ()
