"""Which statistic of universal inversion separates, and whether shadow networks calibrate it."""
