"""What a real server does when something around it fails."""
