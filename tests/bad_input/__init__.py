"""What must not work: each case fails with one clear line, leaves nothing behind and never ends the process."""
