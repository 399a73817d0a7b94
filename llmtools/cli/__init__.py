"""The command line: `verbs` are the commands, `main` runs one, `legacy` has the older options."""
