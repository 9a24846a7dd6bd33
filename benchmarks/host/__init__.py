"""What the host costs beside a GPU: the engine over a device that takes a stated time a step, and no core."""
