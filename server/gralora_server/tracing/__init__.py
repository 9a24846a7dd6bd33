"""Spans of requests for OpenTelemetry, made of their timelines when they have ended. Off: nothing of it is imported."""
