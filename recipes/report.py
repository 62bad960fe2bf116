from trl_reasoning_distill.scripts.report import main

if __name__ == "__main__":
    main()
