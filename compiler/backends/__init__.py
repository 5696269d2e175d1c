"""The targets: what turns the portable model into something a runtime executes at speed, one package each."""
