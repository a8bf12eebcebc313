"""Lightning callbacks: guards, progress, throughput, panels, probe."""
