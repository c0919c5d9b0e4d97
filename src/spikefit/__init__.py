"""spikefit"""
