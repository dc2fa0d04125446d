"""Reports of runs, from their run folders alone: one page, one text for a pull request, and several runs compared.

blocks     what a report consists of: notes, tables, charts, code
run        the sections of one run's report
comparing  the settings in which runs differ, and the sections that compare them
charts     a chart as SVG
html       a page that stands alone, also for ``peftcli inspect``
markdown   the same sections as GitHub's Markdown
picture    curves of runs as PNG or SVG
write      the files of a report
"""
