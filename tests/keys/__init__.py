"""Key management systems: real ones where they run on a test machine, and what is asked of each type of source."""
