"""The laboratory: measures, truths, statistics, claims, tables and benches."""
