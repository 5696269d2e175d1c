"""Select which transform stands at every site, and keep the choice: policies, what they decide by, and the plan."""
