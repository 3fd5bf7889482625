"""Run the simulation: `python -m cluster.simulation --seeds 1000` simulates a thousand fleets."""

from cluster.simulation.runner import main

if __name__ == "__main__":
    main()
