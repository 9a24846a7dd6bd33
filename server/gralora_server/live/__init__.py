"""The page that shows a server at work, on a port and a thread of its own."""
