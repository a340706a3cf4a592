"""The command line, the recipe runner, the report, and the recipes."""
