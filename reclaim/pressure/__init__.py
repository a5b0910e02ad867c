"""Where the wish for free memory comes from: budgets and cgroups."""
