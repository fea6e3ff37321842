"""Result files -> tables. Reads files only, never live objects: needs neither torch nor Lightning."""
