"""Networks that describe images, one file each; the table is in `eval/features.py`."""
