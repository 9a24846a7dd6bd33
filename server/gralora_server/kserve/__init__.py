"""The server as KServe's and Triton's clients speak to it: their messages become ours, and answers of ours theirs."""
