"""Image files of each format to grey at full size, and the limits that all keep. Nothing here resizes."""
