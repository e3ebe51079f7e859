"""fewstep: large diffusion and flow teachers, distilled to students of one to four network calls."""
