"""Replicas on Ray Serve: the same parts as behind a port of our own, and what several of them have in common.

`ingress`, `homes` and `affinity` run in Serve's proxies and `changes` in an actor, all else in replicas. Of it all
only `deployment`, `remote_log` and `local` know Ray.
"""
