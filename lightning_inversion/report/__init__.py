"""Result files -> tables. Reads files only, never live objects: no torch, no Lightning."""
