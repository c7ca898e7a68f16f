"""Where the time of a decoded token goes: recorded from a running engine, drawn, and written for trace viewers."""
