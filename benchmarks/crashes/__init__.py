"""What `run_crashes.py` is made of: commands killed at random, and disks after a power cut. Nothing here is timed."""
