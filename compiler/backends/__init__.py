"""One backend per target: how the portable model becomes what that runtime executes best."""
