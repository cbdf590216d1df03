"""The tables of the Markdown files, each a function that makes it of files of bench/results."""
