from sslpre.cli import main

main()
