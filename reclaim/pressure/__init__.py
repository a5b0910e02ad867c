"""Sources of memory pressure: budgets, cgroups and pressure stall information."""
