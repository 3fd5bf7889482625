"""Run simulated fleets: `python -m cluster.simulation --seeds 1000` runs a thousand fleets."""

from cluster.simulation.runner import main

if __name__ == "__main__":
    main()
