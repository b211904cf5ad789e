"""The scripts beside the tests are started by them, and have nothing to collect."""

collect_ignore_glob = ["ddp_*.py"]
