"""The library of the book, in rooms; imports go down only.

Core:
    taps          named tensors of a forward pass, handed over while they exist
    measure       one pass of every network, for any set of measurements
    cka           similarity of layers, without bias from minibatches
    records       results with labelled axes, cached by what they depend on
    intervals     estimates with their intervals, by leaving out groups or counting
    processes     the same by many processes
    plots         figures and tables
Rooms:
    measurements  attention, heads, receptive fields, norm ratios, localisation, probes
    findings      the paper's claims, each with its statistic and threshold
    studies       images and networks: the lab, and others like it
    site          from chapters to pages; __main__ is its command line

A new measurement derives from measure.Measurement, a new claim is a line in a module of findings, a
new study a file in studies and its entry there.
"""
