"""The study: does the encoder make recommenders better, on which data, and against which controls?"""
