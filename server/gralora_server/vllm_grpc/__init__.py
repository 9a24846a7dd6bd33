"""The server as NVIDIA Dynamo speaks to vLLM: their messages become ours, and answers of ours theirs."""
