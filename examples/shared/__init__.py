"""What the scripts share: command line and summary, data by path or generated, small networks. Nothing to run here."""
