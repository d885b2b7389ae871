"""Runs `experiments.peers.command`."""

if __name__ == '__main__':  # the processes it starts import this file again, and are to import no jax with it
    from experiments.peers.command import main

    main()
