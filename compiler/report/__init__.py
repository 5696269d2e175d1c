"""The report of a compile: gathered, judged, drawn and written."""
