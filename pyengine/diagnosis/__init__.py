"""What could make pyengine slow or fail on this machine, each finding with its remedy.

Every check is one small function of a Patient: it reads what it needs from there and nowhere else, so that tests can
make up any machine. checks.py has the table of them.
"""
