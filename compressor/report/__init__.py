"""What a run found, for people: a page that stands alone, pictures, and a table for the terminal.

``html.report`` writes the page and its pictures, ``table.summary_table`` makes the table; both take a
``data.ReportData``, plain values that the pipeline fills in.
"""
