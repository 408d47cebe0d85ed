"""What only a GPU can tell: whether the kernels are right there, and how fast they are.

One module for each part of the experiment (`config.Part` names them), and what the parts share: a
`Bench`, where programs are compiled and run; the `Record` of everything that was measured; and a
`Budget` of minutes.
"""
