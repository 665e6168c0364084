from simomerge.cli import main

main()
