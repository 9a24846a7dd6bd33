"""The server over HTTP, as OpenAI's clients speak it: bodies become our messages, and answers of ours theirs."""
