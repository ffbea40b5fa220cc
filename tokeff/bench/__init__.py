"""Speed, measured: `tokeff bench NAME`. Every figure is a median of interleaved runs, next to what the memory allows."""
