"""What a run leaves behind: its folder, table, plots, kept-token pictures and HTML report.

One module for each:

    figures      what an experiment asks to have drawn (no drawing library needed)
    run          the measuring loop, with progress and resume
    folder       the files of a run and how they are written and read
    environment  where a run was made
    table        one table, as terminal text, Markdown and HTML cells
    plots        figures as images; `labels` keeps their labels apart
    kept         which prompt tokens a method kept, as data and as pictures
    html         the report page
    compare      two runs side by side
"""
