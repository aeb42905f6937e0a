"""What commands print.

- print_answer.py: one answer: on a terminal, for a pipe, as JSON
- plan_text.py: a plan
- model_text.py: the installed models
- download_text.py: the plan of a download
- table.py: columns of equal width
- bench_text.py: what mixchat bench found
- verbose.py: what --verbose prints
- failure.py: an error as lines for a person
- show_progress.py, bars.py: bars on a terminal of any width, lines elsewhere
- png.py: pictures, where matplotlib is installed
"""
