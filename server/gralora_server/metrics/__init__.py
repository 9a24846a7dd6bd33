"""The Prometheus page. The only place that knows prometheus_client: the engine counts, this package publishes."""
