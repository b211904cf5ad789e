"""Policies as people write them: mappings and YAML files."""
