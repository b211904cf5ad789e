"""The command lines: the console script ``mixprec``, and a LightningCLI that plans, compares and exports as well."""
