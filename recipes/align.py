from trl_reasoning_distill.scripts.align import main

if __name__ == "__main__":
    main()
